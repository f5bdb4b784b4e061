"""What the studies are made of: one public function per idea, each study a few small files."""
