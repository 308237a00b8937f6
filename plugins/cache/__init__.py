"""Built-in caches."""

from pyllmlite import hookimpl
from pyllmlite_plugins.cache.contiguous import Contiguous
from pyllmlite_plugins.cache.paged import Paged
from pyllmlite_plugins.cache.paged_int8 import PagedInt8


@hookimpl
def pyllmlite_caches():
    return [Paged, Contiguous, PagedInt8]
