"""The built-in strategies, a folder a contract; they come in by the door that third parties use."""
