"""What `compare` and `check` write, by hand."""

from typing import Any

NUMBERS = ["rank", "error", "cosine", "trained", "in_run", "warm", "seconds", "memory"]
NUMBERS += ["gradients", "hvps", "cross_products", "upper_loss"]
ROW: dict[str, Any] = dict.fromkeys(NUMBERS)
ROW |= {"failures": [], "has_state": False, "is_front": False, "spread": {}, "tolerance": 0.0}


def compared() -> dict[str, Any]:
    good = {"label": "implicit", "rank": 1, "error": 2e-15, "seconds": 0.0136, "memory": 1.25e6}
    good |= {"gradients": 2, "hvps": 10, "cross_products": 1, "upper_loss": 36.2}
    good |= {"is_front": True, "has_state": True, "spread": {"seconds": [0.009, 0.0145]}}
    bad = {"label": "<kkt>", "failures": ["seeds 0, 1: has none"]}
    along = [{"error": 0.0, "error_in_run": 1e-2}, {"error": 1e-14, "error_in_run": 3e-2}]
    return {
        "recipe": {"name": "toy", "seed": 0},
        "seeds": [0, 1],
        "left_out": {"fomaml": "needs lower_start"},
        "points": {"0": [{"reference": "closed form"}], "1": None},
        "rows": [ROW | good, ROW | bad],
        "cells": [
            {"label": "implicit", "seed": 0, "along": along},
            {"label": "<kkt>", "seed": 0, "status": "failed"},
        ],
        "notes": ["‖dΦ/dx‖ falls"],
        "command": "bilevel compare toy --seeds 0,1",
    }


def checked() -> dict[str, Any]:
    stats = {"hvps": 10}
    good = {"name": "implicit", "reference": "closed form", "error": 0.025, "cosine": 0.9998}
    good |= {"claim": "solution", "claim_error": 1e-15, "verdict": "exact", "note": ""}
    bad = {"name": "mine", "reference": "closed form", "error": None, "cosine": None, "claim": None}
    bad |= {"claim_error": None, "verdict": "wrong", "note": "its sign is wrong"}
    rows = [row | {"stats": stats} for row in (good, bad)]
    command = "bilevel check toy"
    return {"recipe": "toy", "rows": rows, "content": {"name": "toy"}, "command": command}
