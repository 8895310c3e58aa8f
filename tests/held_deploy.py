"""deploy/app.py, with models that a test can hold: `serve run tests.held_deploy:deploy`."""

import os
from pathlib import Path

from deploy import app
from tests.held import obey


class Replica(app.Replica):
    """The environment is that in which the cluster was started."""

    def __init__(self, *arguments: object) -> None:
        obey(Path(os.environ["HELD"]))
        super().__init__(*arguments)


app.Replica = Replica
deploy = app.deploy
