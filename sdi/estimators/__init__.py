"""Estimators of step gradients: exact ones for small models and tests, sketched ones for use."""
