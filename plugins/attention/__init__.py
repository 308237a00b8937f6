"""Built-in attentions."""

from pyllmlite import hookimpl
from pyllmlite_plugins.attention.flash import Flash
from pyllmlite_plugins.attention.reference import Reference


@hookimpl
def pyllmlite_attentions():
    return [Flash, Reference]
