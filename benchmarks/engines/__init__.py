"""One adapter an engine: ``Engine(model, threads).run(prompts, new_tokens) -> seconds``."""
