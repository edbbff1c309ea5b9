"""The hardware abstraction layer: device facts, the Backend protocol, the registry of backends, their selection, and
`explain`, which says what was selected and why."""
