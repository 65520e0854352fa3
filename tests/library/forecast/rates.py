"""Rates of a made-up machine, of every kind of work."""

RATES = {
    "compile": 100.0,
    "product float32": 2e9,
    "product float32 highest": 2e9,
    "thin float32": 1e9,
    "thin float32 highest": 1e9,
    "product float64": 1e9,
    "thin float64": 5e8,
    "cholesky float64": 5e8,
    "eigh float64 160": 1e8,
    "eigh float64 448": 4e8,
    "exp": 1e8,
    "select": 1e9,
    "gather": 1e8,
    "steps": 1e4,
    "read": 1e9,
    "put": 1e9,
    "write": 1e8,
}
