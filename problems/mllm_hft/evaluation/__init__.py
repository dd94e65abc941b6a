"""What a model is asked after training, and what is measured of its answers.

`questions` asks, `measures` counts (POPE, CHAIR, the modality gap), `examiner` brings both to a
model, `figure` draws. Nothing is trained here.
"""
