"""Report on runs (`tokdyn report`, `tokdyn plot`): sample them, read what lies in their folders, and draw both."""
