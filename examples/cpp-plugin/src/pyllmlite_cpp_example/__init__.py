"""An attention for pyllmlite whose op is C++: chosen with ``attention="cpp-example"``."""

from pyllmlite import hookimpl
from pyllmlite_cpp_example.attention import CppAttention


@hookimpl
def pyllmlite_attentions():
    return [CppAttention]
