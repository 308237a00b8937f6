"""Built-in quantizers."""

from pyllmlite import hookimpl
from pyllmlite_plugins.quantizer.awq import AWQ
from pyllmlite_plugins.quantizer.awq_gptq import AWQGPTQ
from pyllmlite_plugins.quantizer.gptq import GPTQ
from pyllmlite_plugins.quantizer.int8 import LLMInt8
from pyllmlite_plugins.quantizer.nf4 import NormalFloat4
from pyllmlite_plugins.quantizer.none import Unquantized
from pyllmlite_plugins.quantizer.rtn import RoundToNearest


@hookimpl
def pyllmlite_quantizers():
    return [Unquantized, RoundToNearest, LLMInt8, NormalFloat4, GPTQ, AWQ, AWQGPTQ]
