"""What long jobs tell whoever watches them."""


class Events:
    """Progress of a job; this class ignores it. The commands' `Reporter` prints it.

    A job calls these methods from its own thread. They may raise, which ends the job.
    """

    def progress(self, stage: str, done: int, total: int, layer: tuple[int, int] | None = None) -> None:
        """Note progress within one stage of the job.

        Args:
            stage: what is done, and of what the units are: "experts partitioned".
            done: units that are finished.
            total: units in all.
            layer: (index, layers of the model) where the units belong to one layer.
        """

    def resumed(self, layer: int, done: int) -> None:
        """Note that the job begins; an earlier run has finished `done` layers, the last of them with index `layer` (-1: none)."""

    def line(self, text: str, **fields: object) -> None:
        """Note something that is no count.

        Args:
            text: for people.
            fields: the same for machines, by name.
        """
