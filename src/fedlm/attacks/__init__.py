"""What an adversary would do: read text out of updates and models, or steer a federation from inside.

Every attack is a plain function of tensors, losses or models, and each is shown to succeed against a configuration
that is open to it, so that its failure elsewhere means something. `first_round`, `token_recovery`, `final_model` and
`planted` try them on recipes and runs, and `trial` says what came of it. Nothing is imported here.
"""
