"""Factorised layers: the signature of the dense twin plus a rank; built, costed and undone without the model."""

from rankfold.layers._attention import PROJECTIONS, SeparateAttention
from rankfold.layers._build import is_channels_last
from rankfold.layers._contract import Call, Cost, FactorisedLayer, Metric, Options, Rank, Spectrum, Stages
from rankfold.layers._dense import DENSE_TYPES, DenseType, along_outputs, dense_type_of
from rankfold.layers._embedding import LowRankEmbedding, TiedHead, head_macs
from rankfold.layers._fan_in import FanIns, fan_ins
from rankfold.layers._linear import LowRankLinear
from rankfold.layers._refusal import factorisable, hooks_of, refusal, stock_twin, untwinned
from rankfold.layers._register import register, registered
from rankfold.layers._rows import Rows, output_rows, output_size, row_size, rows_of
from rankfold.layers._table import (
    BLOCKS,
    TABLE,
    block_class,
    dense_cost,
    is_factorised,
    layer_class,
    methods_for,
    tied_methods,
)
from rankfold.layers._unfolding import folded, unfolded
from rankfold.layers.conv._conv_cp import CPConv1d, CPConv2d, CPConv3d
from rankfold.layers.conv._conv_svd import LowRankConv1d, LowRankConv2d, LowRankConv3d
from rankfold.layers.conv._conv_tucker import TuckerConv1d, TuckerConv2d, TuckerConv3d
from rankfold.layers.flexible._flexible import FlexibleActivation, FlexibleLayer, FlexibleLinear
from rankfold.layers.flexible._flexible_conv import FlexibleConv1d, FlexibleConv2d, FlexibleConv3d, pointwise_twin
from rankfold.layers.svd_form._svd_form import SVDForm, SVDLinear
from rankfold.layers.svd_form._svd_form_conv import SVDConv1d, SVDConv2d, SVDConv3d
from rankfold.layers.tensor._btt import BTTLinear
from rankfold.layers.tensor._kronecker import KroneckerLinear
from rankfold.layers.tensor._ring import TRLinear
from rankfold.layers.tensor._tt_conv import TTConv1d, TTConv2d, TTConv3d
from rankfold.layers.tensor._tt_embedding import TTEmbedding
from rankfold.layers.tensor._tt_linear import TTLinear

__all__ = [
    "BLOCKS",
    "BTTLinear",
    "CPConv1d",
    "CPConv2d",
    "CPConv3d",
    "Call",
    "Cost",
    "DENSE_TYPES",
    "DenseType",
    "FactorisedLayer",
    "FanIns",
    "FlexibleActivation",
    "FlexibleConv1d",
    "FlexibleConv2d",
    "FlexibleConv3d",
    "FlexibleLayer",
    "FlexibleLinear",
    "KroneckerLinear",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankEmbedding",
    "LowRankLinear",
    "Metric",
    "Options",
    "PROJECTIONS",
    "Rank",
    "Rows",
    "SVDConv1d",
    "SVDConv2d",
    "SVDConv3d",
    "SVDForm",
    "SVDLinear",
    "SeparateAttention",
    "Spectrum",
    "Stages",
    "TABLE",
    "TRLinear",
    "TTConv1d",
    "TTConv2d",
    "TTConv3d",
    "TTEmbedding",
    "TTLinear",
    "TiedHead",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "along_outputs",
    "block_class",
    "dense_cost",
    "dense_type_of",
    "factorisable",
    "fan_ins",
    "folded",
    "head_macs",
    "hooks_of",
    "is_channels_last",
    "is_factorised",
    "layer_class",
    "methods_for",
    "output_rows",
    "output_size",
    "pointwise_twin",
    "refusal",
    "register",
    "registered",
    "row_size",
    "rows_of",
    "stock_twin",
    "tied_methods",
    "unfolded",
    "untwinned",
]
