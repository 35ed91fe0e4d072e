"""The monitor: captures a training step, measures what the step did, and records it.

A feature takes one way from the hook to the file, and no module imports from a module further down that way::

    capture/taps        hooks on the watched layers, also in graphs of torch.compile
    capture/capture     ForwardCapture: inputs and state of a forward; LayerCall: rows of features and backward vectors
        |
    measure/modes       a CaptureMode runs second forwards (capture/replay) and returns a FeatureObservation:
        |               rows -> RowSums -> LayerSums (measure/row_sums) -> verdict (measure/assessment)
        |               beside it: parameter updates (measure/parameters), aligned decrease, learned structure
    engine              calls these parts in order, and collects the tensors of one step
        |
    payload             StepCodec.encode: one vector on the device
        |
    _record/writing     the ring waits on the device and copies batches to the host; in a thread of its own, the writer
        |               has StepCodec.decode make parts,
    _record/ranks       which are merged with those of the other ranks and become records, which sinks write

``step_runner`` calls the engine around optimizer steps (``steps``) at the steps that ``schedule`` names, and recovers
from failures and interrupts. ``monitor`` is what users see: it checks arguments (``settings``, ``optimizers``) and puts
the parts together. ``ranks`` knows the other processes of the run.
"""
