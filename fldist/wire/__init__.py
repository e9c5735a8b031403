"""The wire: messages, links, the ledger. Knows kinds and layouts, never an algorithm or a round's meaning."""
