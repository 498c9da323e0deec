"""Entropy control inside verl's actor: the native loss is wrapped per micro-batch, never copied."""
