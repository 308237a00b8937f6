"""Built-in caches."""

from pyllmlite import hookimpl
from pyllmlite_plugins.cache.contiguous import Contiguous
from pyllmlite_plugins.cache.paged import Paged


@hookimpl
def pyllmlite_caches():
    return [Paged, Contiguous]
