"""Passes that adapt a captured Program; `graftc.compiler.adapting` defines their order."""
