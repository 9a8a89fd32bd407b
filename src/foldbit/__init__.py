"""foldbit: neural networks of 1 and 2 bits, x ≈ v1·s1 + v2·s2 + …, s ∈ {-1, +1}."""

from foldbit import models as models
from foldbit.calibrate import CalibrationReport as CalibrationReport
from foldbit.calibrate import LayerCalibration as LayerCalibration
from foldbit.calibrate import calibrate as calibrate
from foldbit.convert import ConversionReport as ConversionReport
from foldbit.convert import conversion_report as conversion_report
from foldbit.convert import pack_ as pack_
from foldbit.convert import quantize_ as quantize_
from foldbit.core.config import QuantConfig as QuantConfig
from foldbit.core.encoding import encode as encode
from foldbit.core.folding import Quantized as Quantized
from foldbit.core.folding import fold as fold
from foldbit.core.folding import quantize as quantize
from foldbit.core.folding import unfold as unfold
from foldbit.core.low_rank import LowRank as LowRank
from foldbit.core.low_rank import low_rank as low_rank
from foldbit.core.schemes import Scheme as Scheme
from foldbit.core.solvers import solve as solve
from foldbit.nn.layers import QuantConv1d as QuantConv1d
from foldbit.nn.layers import QuantConv2d as QuantConv2d
from foldbit.nn.layers import QuantLinear as QuantLinear
from foldbit.packed.files import CorruptPackedFile as CorruptPackedFile
from foldbit.packed.files import MismatchedModel as MismatchedModel
from foldbit.packed.files import NotPackedFile as NotPackedFile
from foldbit.packed.files import PackedFileError as PackedFileError
from foldbit.packed.files import UnsupportedVersion as UnsupportedVersion
from foldbit.packed.layers import PackedConv1d as PackedConv1d
from foldbit.packed.layers import PackedConv2d as PackedConv2d
from foldbit.packed.layers import PackedLinear as PackedLinear
from foldbit.storage import load_packed as load_packed
from foldbit.storage import save_packed as save_packed
from foldbit.summary import summary as summary

__version__ = "0.1.0"
