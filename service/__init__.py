"""A REST service that serves an exported model. It can be imported without torch."""
