"""Predictions and labels to numbers and pictures. Floor 1; knows no model."""
