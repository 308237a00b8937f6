"""One adapter an engine: ``Engine(model, threads).run(prompts, new_tokens) -> seconds``, and
``version()``.  ``facts()``, where there is one, is written down beside the results."""
