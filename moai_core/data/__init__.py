"""Text in, batches out: files to records (read, records), records to tokens on disk (tokenize, cache), tokens to
rows (pack), rows to batches (loader).
"""
