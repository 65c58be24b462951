"""What a run says about itself: metrics, TensorBoard, the console, the log and the report page.

Nothing is imported here, so that `tracking.progress` costs neither torch nor TensorBoard.
"""
