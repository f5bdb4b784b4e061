"""Schedules: ways to compute the one sum ``y_t = sum_e g_te E_e(x_t)``."""
