package apiserver

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/authenticatorfactory"
	"k8s.io/apiserver/pkg/authentication/request/headerrequest"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controller/serviceaccount"
	serviceaccounttoken "k8s.io/kubernetes/pkg/serviceaccount"
	bootstraptoken "k8s.io/kubernetes/plugin/pkg/auth/authenticator/token/bootstrap"
)

// identity is who may speak and what they may do.
type identity struct {
	authenticator authenticator.Request
	tokens        *tokenCache
	audiences     authenticator.Audiences
	authorizer    authorizer.Authorizer
	decisions     *decisions // the authorizer, as what it is
	rules         authorizer.RuleResolver
	requestHeader *authenticatorfactory.RequestHeaderConfig
	issuer        serviceaccounttoken.TokenGenerator
	keys          serviceaccounttoken.PublicKeysGetter
	clientCA      dynamiccertificates.CAContentProvider
	// reload follows the authentication configuration file; nil without one.
	reload *reloader
}

// newIdentity builds upstream's authenticators and authorizers over our informers.
func newIdentity(ctx context.Context, c *Config, client kubernetes.Interface) (*identity, error) {
	id := &identity{audiences: authenticator.Audiences{ServiceAccountIssuer}}
	if given := c.options().Authentication.APIAudiences; len(given) > 0 {
		id.audiences = given
	}
	var err error
	if id.clientCA, err = dynamiccertificates.NewStaticCAContent("client-ca", c.ClientCA); err != nil {
		return nil, err
	}
	if id.requestHeader, err = requestHeaderConfig(c); err != nil {
		return nil, err
	}
	if id.issuer, err = serviceaccounttoken.JWTTokenGenerator(ServiceAccountIssuer, c.ServiceAccountKey); err != nil {
		return nil, fmt.Errorf("make the service-account token issuer: %w", err)
	}
	if id.keys, err = serviceaccounttoken.StaticPublicKeysGetter([]any{c.ServiceAccountKey.Public()}); err != nil {
		return nil, err
	}
	if err := id.authenticate(ctx, c, client); err != nil {
		return nil, err
	}
	decide, rules, err := newAuthorizer(ctx, c)
	if err != nil {
		return nil, err
	}
	id.decisions = newDecisions(decide, c.Registry, !isDefaultAuthorization(c.options().Authorization))
	id.authorizer, id.rules = id.decisions, rules
	return id, nil
}

func requestHeaderConfig(c *Config) (*authenticatorfactory.RequestHeaderConfig, error) {
	provider, err := dynamiccertificates.NewStaticCAContent("request-header-ca", c.RequestHeaderCA)
	if err != nil {
		return nil, err
	}
	return &authenticatorfactory.RequestHeaderConfig{
		UsernameHeaders:     headerrequest.StaticStringSlice{"X-Remote-User"},
		UIDHeaders:          headerrequest.StaticStringSlice{"X-Remote-Uid"},
		GroupHeaders:        headerrequest.StaticStringSlice{"X-Remote-Group"},
		ExtraHeaderPrefixes: headerrequest.StaticStringSlice{"X-Remote-Extra-"},
		CAContentProvider:   provider,
		AllowedClientNames:  headerrequest.StaticStringSlice{c.ProxyClientName},
	}, nil
}

// authenticate sets up client certificates, service-account and bootstrap tokens, the front proxy, and in-process callers.
func (id *identity) authenticate(ctx context.Context, c *Config, client kubernetes.Interface) error {
	core := c.Informers.Core().V1()
	secrets := core.Secrets().Lister().Secrets("kube-system")
	getter := serviceaccount.NewGetterFromClient(client, core.Secrets().Lister(), core.ServiceAccounts().Lister(), core.Pods().Lister(), core.Nodes().Lister())
	config, err := authenticationConfig(c.options().Authentication)
	if err != nil {
		return err
	}
	config.BootstrapToken = true
	config.BootstrapTokenAuthenticator = bootstraptoken.NewTokenAuthenticator(secrets)
	config.ServiceAccountLookup = true
	config.ServiceAccountIssuers = []string{ServiceAccountIssuer}
	config.APIAudiences = id.audiences
	config.RequestHeaderConfig = id.requestHeader
	config.ServiceAccountPublicKeysGetter = id.keys
	config.ServiceAccountTokenGetter = getter
	config.SecretsWriter = client.CoreV1()
	config.ClientCAContentProvider = id.clientCA
	config.TokenSuccessCacheTTL /= 2 // the other half is the token cache's
	remote, update, _, _, err := config.New(ctx)
	if err != nil {
		return fmt.Errorf("make the authenticators: %w", err)
	}
	id.tokens = newTokenCache(newCertificateCache(remote), id.audiences, config.TokenSuccessCacheTTL)
	if o := c.options().Authentication; o.AuthenticationConfigFile != "" {
		id.reload = &reloader{options: o, update: id.tokens.forgetAfter(update), seen: config.AuthenticationConfigData}
	}
	id.authenticator = &inProcessFirst{user: c.InProcessUser, audiences: id.audiences, next: id.tokens}
	return nil
}

// byKnownToken gives the user that a request without any other proof is from by a token that was verified a moment ago.
func (id *identity) byKnownToken(req *http.Request) (user.Info, bool) {
	token := soleToken(req)
	if token == "" {
		return nil, false
	}
	u, ok := id.tokens.find(token, time.Now())
	return u.user, ok
}

// byCertificate gives the user that a request without any other proof is from by its client certificate.
func (id *identity) byCertificate(req *http.Request) (user.Info, bool) {
	resp, ok, err := id.authenticator.AuthenticateRequest(req)
	if err != nil || !ok || len(resp.Audiences) > 0 {
		return nil, false
	}
	return resp.User, true
}

// inProcessFirst trusts the identity that an in-process caller carries in its context; a request from a socket has none.
type inProcessFirst struct {
	user      func(context.Context) (user.Info, bool)
	audiences authenticator.Audiences
	next      authenticator.Request
}

func (a *inProcessFirst) AuthenticateRequest(req *http.Request) (*authenticator.Response, bool, error) {
	if u, ok := a.user(req.Context()); ok {
		return &authenticator.Response{User: u, Audiences: a.audiences}, true, nil
	}
	return a.next.AuthenticateRequest(req)
}

// newAuthorizer asks who decides, by default what a node needs for its own pods, then RBAC.
func newAuthorizer(ctx context.Context, c *Config) (authorizer.Authorizer, authorizer.RuleResolver, error) {
	config, err := authorizationConfig(c.options().Authorization, c.Informers)
	if err != nil {
		return nil, nil, err
	}
	a, rules, err := config.New(ctx, serverID)
	if err != nil {
		return nil, nil, fmt.Errorf("make the authorizers: %w", err)
	}
	return a, rules, nil
}
