"""Built-in schedulers."""

from pyllmlite import hookimpl
from pyllmlite_plugins.scheduler.continuous import Continuous
from pyllmlite_plugins.scheduler.dynamic import Dynamic
from pyllmlite_plugins.scheduler.static import Static


@hookimpl
def pyllmlite_schedulers():
    return [Continuous, Static, Dynamic]
