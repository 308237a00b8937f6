"""Built-in quantizers."""

from pyllmlite import hookimpl
from pyllmlite_plugins.quantizer.none import Unquantized
from pyllmlite_plugins.quantizer.rtn import RoundToNearest


@hookimpl
def pyllmlite_quantizers():
    return [Unquantized, RoundToNearest]
