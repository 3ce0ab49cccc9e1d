"""The commands of `orchestrator`, a function each; `orchestrator.main` collects them."""
