import pytest
from text_model import write_text_model


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A tiny Llama with a tokenizer: 2 layers, hidden size 64, 4 heads (2 for keys)."""
    return write_text_model(tmp_path_factory.mktemp("models") / "teacher", seed=1)
