"""The packages are `common`, `agent`, `controller` and `cli`; an agent's host needs only the base requirements."""

from setuptools import find_packages, setup

AGENT = ["pyzmq>=25", "msgpack>=1.0.5", "msgspec>=0.18.6", "psutil>=5.9"]
CONTROLLER = [
    "tornado>=6.3", "sqlalchemy>=2.0", "alembic>=1.10", "orjson>=3.8", "cryptography>=42", "pyyaml>=6", "cronsim>=2.6",
]  # fmt: skip
POSTGRESQL = ["psycopg[binary]>=3.1"]
TEST = [
    "pytest>=8", "pytest-asyncio>=0.24", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "hypothesis>=6.100",
    "httpx>=0.27", "ruff>=0.6", "mypy>=1.11", "import-linter>=2.0", "types-PyYAML", "types-psutil",
]  # fmt: skip

setup(
    name="vzfleet",
    version="0.1.0",
    description="One REST endpoint for a whole fleet of container hosts",
    python_requires=">=3.11",
    packages=find_packages(include=["common*", "agent*", "controller*", "cli*"]),
    package_data={"controller": ["store/migrations/*", "store/migrations/versions/*", "web/*"]},
    install_requires=AGENT,
    extras_require={
        "controller": CONTROLLER,
        "postgresql": POSTGRESQL,
        "test": CONTROLLER + POSTGRESQL + TEST,
    },
)
