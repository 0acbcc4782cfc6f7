"""The agent of a node: carries out commands on its containers and pushes their figures. Knows no controller code."""
