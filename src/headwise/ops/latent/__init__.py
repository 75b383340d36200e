"""Multi-head latent attention (MLA): the operator, its definition, and the choice of its form."""
