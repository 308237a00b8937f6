"""Built-in decoding: selectors, proposers, constraints."""

from pyllmlite import hookimpl
from pyllmlite_plugins.decoder.beam import Beam
from pyllmlite_plugins.decoder.draft_model import DraftModelProposer
from pyllmlite_plugins.decoder.guidance import Guidance
from pyllmlite_plugins.decoder.prompt_lookup import PromptLookup
from pyllmlite_plugins.decoder.sample import Sample


@hookimpl
def pyllmlite_decoders():
    return [Sample, Beam, PromptLookup, DraftModelProposer, Guidance]
