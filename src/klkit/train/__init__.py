"""Training a policy towards a reward, held to its reference by a KL penalty."""
