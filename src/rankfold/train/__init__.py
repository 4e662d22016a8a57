"""Training: recover what compression lost, train towards low rank, learn the activations of a block."""

from rankfold.train._adapters import lightning_callback, trainer_callback
from rankfold.train._batchnorm import reestimate_batchnorm
from rankfold.train._cuttlefish import Cuttlefish
from rankfold.train._decouple import BlockError, decouple, decouple_errors, flexible_candidates
from rankfold.train._distil_blocks import BlockFit, distil_blocks
from rankfold.train._dlrt import DLRT
from rankfold.train._fit import fit
from rankfold.train._groups import parameter_groups
from rankfold.train._lc import LC
from rankfold.train._method import TrainingMethod
from rankfold.train._methods import METHODS, training_method
from rankfold.train._nuclear import NuclearNorm
from rankfold.train._penalties import KINDS
from rankfold.train._pufferfish import Pufferfish
from rankfold.train._recipe import Epoch, History, Recipe
from rankfold.train._restart import restarted
from rankfold.train._svd_form import svd_form
from rankfold.train._svd_training import SVDTraining
from rankfold.train._trp import TRP

__all__ = [
    "BlockError",
    "BlockFit",
    "Cuttlefish",
    "DLRT",
    "Epoch",
    "History",
    "KINDS",
    "LC",
    "METHODS",
    "NuclearNorm",
    "Pufferfish",
    "Recipe",
    "SVDTraining",
    "TRP",
    "TrainingMethod",
    "decouple",
    "decouple_errors",
    "distil_blocks",
    "fit",
    "flexible_candidates",
    "lightning_callback",
    "parameter_groups",
    "reestimate_batchnorm",
    "restarted",
    "svd_form",
    "trainer_callback",
    "training_method",
]
