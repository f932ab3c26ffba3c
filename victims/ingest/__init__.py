"""From files of pictures and captions to a corpus: forms of sources, decoding, parts, joining."""
