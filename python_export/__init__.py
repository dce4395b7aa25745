"""Everything around a checkpoint that is not serving it: tiny and demo checkpoints, per-stage export, validation, oracle."""
