"""Conversations: their layouts, the chat templates that write them, and which tokens are trained."""
