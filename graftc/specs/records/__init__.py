"""The base class of records. The records themselves are in `graftc.records`, which also reads them from JSON."""
