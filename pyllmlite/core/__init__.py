"""Plain data that every other part speaks: no strategy, no native code, no torch."""
