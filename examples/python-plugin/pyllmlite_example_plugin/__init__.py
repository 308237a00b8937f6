"""A pyllmlite plugin: its hooks return the classes that it brings."""

from pyllmlite import hookimpl
from pyllmlite_example_plugin.fair import Fair
from pyllmlite_example_plugin.last_words import LastWords


@hookimpl
def pyllmlite_schedulers():
    return [Fair]


@hookimpl
def pyllmlite_decoders():
    return [LastWords]
