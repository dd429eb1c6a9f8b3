"""Phases of SGD on a language model: what n-grams know first, something specific later?"""
