"""What an adversary would do: read text out of updates and models, or steer a federation from inside.

Every attack is a plain function of tensors, losses or models, and each is shown to succeed against a configuration
that is open to it, so that its failure elsewhere means something. Nothing is imported here.
"""
