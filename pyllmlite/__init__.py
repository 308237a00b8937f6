"""pyllmlite makes language models light and serves them fast; every strategy is a plugin."""
