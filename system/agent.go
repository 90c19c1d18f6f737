package system

import (
	"context"
	"errors"

	"knarr/cli"
)

// RunAgent implements cli.System.
func (s *System) RunAgent(ctx context.Context, config cli.AgentConfig) error {
	return errors.New("agent")
}
