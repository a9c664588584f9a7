"""The commands, each in a file of the same name. `graftc.cli.app` lists them; help and listings do not import torch."""
