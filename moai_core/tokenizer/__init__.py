"""Tokenizers: trained from text (train), extended by a domain's words (extend), measured beside others (evaluate)."""
