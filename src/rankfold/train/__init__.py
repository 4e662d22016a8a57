"""Training: recover what compression lost, with the dense model as the teacher."""

from rankfold.train._batchnorm import reestimate_batchnorm
from rankfold.train._fit import fit
from rankfold.train._recipe import Epoch, History, Recipe

__all__ = ["Epoch", "History", "Recipe", "fit", "reestimate_batchnorm"]
