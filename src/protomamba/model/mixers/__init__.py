"""The layers of the residual stack."""
