"""Why a goal is missed and what comes next, by network and goal; the page prints them beside the figure."""

REMARKS: dict[str, str] = {}
"""'NETWORK: GOAL' -> cause and next step. Goals: accuracy; accuracy, dynamic; export; speed; certificate."""
